"""Results: scores, and everything a user does with them."""

# Both, so that either can load what the other saved.
from stride_lightning.results.attribution import Attribution as Attribution
from stride_lightning.results.top_attribution import TopAttribution as TopAttribution
