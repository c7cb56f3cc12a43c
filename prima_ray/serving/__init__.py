"""A diagnosis over HTTP: the app is plain ASGI and knows no Ray; `deployments` alone puts it on Ray Serve."""
