"""The document relay (`documents: relay`): presigned URLs of Amazon's storage, replaced and served by the proxy.

`relay_rewrite.DocumentRewriter` replaces URLs in responses, `relay_serve.DocumentServer` serves the addresses. May
import proxy.request.upstream and proxy.request.tokens. Imported only where the setting needs it, for it needs
`cryptography`.
"""
