"""One prompt's storage over its life."""
