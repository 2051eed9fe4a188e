"""The JSON API: the index's questions over HTTP, with an OpenAPI document that describes them."""
