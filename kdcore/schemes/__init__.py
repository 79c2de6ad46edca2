"""The schemes, which define which model teaches which. Only they run models; they do not depend on the objective."""
