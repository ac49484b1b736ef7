"""From a configuration to adapters beside a base."""
