"""The coordinator: trains surrogates on public data and signs the bundles that hospitals run."""
