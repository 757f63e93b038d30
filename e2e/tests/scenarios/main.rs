//! The behaviour that users rely on, as scenarios on a real Kubernetes with two nodes. Each says what is
//! given, what happens, and what the result must be. The harness is the crate's library. Those whose name
//! begins with `long` take minutes: `make test-long` runs them, and `make test` all others.

mod long_autoscaling;
mod long_control_faults;
mod long_nodes;
mod long_pod_faults;
mod long_rollout_faults;
mod long_verdicts;
mod s10_repair;
mod s10_scale_down;
mod s11_clients;
mod s12_rollout;
mod s13_analysis;
mod s14_in_place;
mod s15_ab_test;
mod s16_classify;
mod s17_sources;
mod s18_specs;
mod s19_route_and_pod_monitor;
mod s19_service_monitor;
mod s1_install;
mod s20_plugin;
mod s21_children;
mod s22_adapters;
mod s23_weights;
mod s24_shared_cache;
mod s2_first_token;
mod s3_delete;
mod s4_causes;
mod s5_pod_kill;
mod s6_validation;
mod s7_operator_away;
mod s8_change;
mod s9_embeddings;
