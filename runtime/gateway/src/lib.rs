//! The front door: routes, balances, retries.
