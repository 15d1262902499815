"""Films + features/ -> an encoder, by an EHR-conditioned masked Siamese network. Never reads a label."""
