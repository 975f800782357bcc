"""Networks, and what lies around them: encoding of observations, normalisers, flat parameters."""
