"""From the numbers of final_report.json to what people read: sentences, tables, figures, and the documents made of them."""
