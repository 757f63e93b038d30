//! Statistics of A/B tests that may be looked at all the time.
//!
//! The unit of analysis is a bucket of users: each user belongs to one of a few hundred buckets, and the
//! variance of an arm is that between its buckets. So many requests of one user are not taken for many
//! independent ones. Estimates are compared by sequential tests whose clock is information (the inverse of
//! the variance of the estimate), so that their error rate holds however often they are looked at.
//!
//! Everything is a function of sums. Nothing here does I/O or reads a clock.

pub mod buckets;
pub mod correction;
pub mod cuped;
pub mod power;
pub mod quantile;
pub mod request;
pub mod sequential;
pub mod special;
pub mod split_check;
pub mod verdict;
