"""The provider: claims the jobs assigned to it, runs them and reports their exit status."""
