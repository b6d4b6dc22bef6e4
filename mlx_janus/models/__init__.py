"""The networks, one part a file, with the checkpoint's attribute names. They open no files."""
