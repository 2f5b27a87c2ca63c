"""Health, metrics and the status page, on the admin and the health address.

`app` makes the two applications, `middlewares` decides who may ask. `snapshot` gathers the state, `diagnosis`
says what is wrong, and `status_page` (with `status_charts` and `status_html`) shows it. Imports config, errors,
observability and request; of the server only this package.
"""
