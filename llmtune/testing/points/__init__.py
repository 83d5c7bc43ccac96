"""The laws, a module for each extension point. `laws(subject)` of each returns those that apply."""
