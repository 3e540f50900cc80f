"""Quality contracts: bounds, certificates, calibration runs, the live monitor."""
