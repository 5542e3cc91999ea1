"""The figures of the report, as inline SVG: shapes carry class names, the page's style gives them their colours."""
