//! What users were promised, told as stories on a real Kubernetes with two nodes. Read them in order: each says what is
//! given, what happens, and what must be seen. The harness is the crate's library.

mod s1_install;
mod s2_first_token;
mod s3_delete;
mod s4_causes;
mod s5_pod_kill;
mod s6_validation;
mod s7_operator_away;
mod s8_change;
mod s9_embeddings;
