"""JupyterLab: its server on the notebooks, and what a researcher explores with in them."""
