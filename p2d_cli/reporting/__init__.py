"""Pictures and pages made from finished results."""
