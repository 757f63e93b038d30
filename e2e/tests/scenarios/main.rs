//! The behaviour that users rely on, as scenarios on a real Kubernetes with two nodes. Each says what is
//! given, what happens, and what the result must be. The harness is the crate's library.

mod s10_repair;
mod s11_clients;
mod s12_rollout;
mod s13_analysis;
mod s14_in_place;
mod s15_ab_test;
mod s16_classify;
mod s1_install;
mod s2_first_token;
mod s3_delete;
mod s4_causes;
mod s5_pod_kill;
mod s6_validation;
mod s7_operator_away;
mod s8_change;
mod s9_embeddings;
