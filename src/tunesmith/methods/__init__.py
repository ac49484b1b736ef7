"""The methods, one file each: config, mathematics, paper. Importing one registers it."""
