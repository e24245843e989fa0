"""Who may ask, from where, how often; and what is known of a request on its way."""
