"""Which model teaches which. A scheme alone runs models, and does not depend on the objective."""
