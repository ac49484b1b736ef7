"""New adapters out of trained ones, by arithmetic on their values; one small file per idea."""
