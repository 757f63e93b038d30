//! The execution plan: ops, passes, arena, the Backend trait and the scalar oracle.
