"""Chat models; each file is one provider."""
