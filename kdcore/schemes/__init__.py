"""Who teaches whom. A scheme alone runs models; it knows no objective."""
