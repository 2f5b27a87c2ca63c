"""Restricted report types, and the document ids in responses of the Reports API.

A document id does not reveal its type; the responses of getReport and getReports do (model reports_2021-06-30).
"""

from collections.abc import Iterator, Mapping

from proxy.amazon.error_response import parse_object

# Only these need a Restricted Data Token, and only for getReportDocument (OLD Tokens guide; the three of the
# reconciliation in its 2021 edition alone).
RESTRICTED_TYPES = frozenset(
    {
        "GET_AMAZON_FULFILLED_SHIPMENTS_DATA_INVOICING",
        "GET_AMAZON_FULFILLED_SHIPMENTS_DATA_TAX",
        "GET_EASYSHIP_DOCUMENTS",
        "GET_FLAT_FILE_ACTIONABLE_ORDER_DATA_SHIPPING",
        "GET_FLAT_FILE_ORDERS_RECONCILIATION_DATA_INVOICING",
        "GET_FLAT_FILE_ORDERS_RECONCILIATION_DATA_SHIPPING",
        "GET_FLAT_FILE_ORDERS_RECONCILIATION_DATA_TAX",
        "GET_FLAT_FILE_ORDER_REPORT_DATA_INVOICING",
        "GET_FLAT_FILE_ORDER_REPORT_DATA_SHIPPING",
        "GET_FLAT_FILE_ORDER_REPORT_DATA_TAX",
        "GET_GST_MTR_B2B_CUSTOM",
        "GET_ORDER_REPORT_DATA_INVOICING",
        "GET_ORDER_REPORT_DATA_SHIPPING",
        "GET_ORDER_REPORT_DATA_TAX",
        "GET_VAT_TRANSACTION_DATA",
        "SC_VAT_TAX_REPORT",
    }
)

REPORT_OPERATIONS = frozenset({"reports.2021-06-30.getReport", "reports.2021-06-30.getReports"})

_MAX_ID = 256


def documents_in(body: bytes) -> Iterator[tuple[str, str]]:
    """Yield document id and report type of every finished report in a response."""
    response = parse_object(body)
    reports = response.get("reports", [response])
    for report in reports if isinstance(reports, list) else ():
        if isinstance(report, Mapping):
            document, kind = report.get("reportDocumentId"), report.get("reportType")
            if isinstance(document, str) and isinstance(kind, str) and 0 < len(document) <= _MAX_ID:
                yield document, kind
