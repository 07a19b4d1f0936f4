"""`/api/`: what administrators see of a broker, and what they can do, one module for each resource."""
