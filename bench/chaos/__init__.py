"""The storm: many small real jobs, everything around them killed at random, and a look from outside at what is left."""
