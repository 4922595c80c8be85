"""Bridges to other libraries; each imports its library and is imported only where that library is used."""
