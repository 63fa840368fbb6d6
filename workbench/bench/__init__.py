"""What the workbench costs on this machine, measured side by side in one run."""
