//! What a launch is checked for: happens-before races, memory never written, and how findings are reported.

pub mod clock;
pub mod report;
pub mod shadow;
pub mod symbols;
