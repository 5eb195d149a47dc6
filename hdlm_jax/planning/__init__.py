"""Plans: the real program compiled for TPUs that are not here, and what its compiler says of it."""
