//! The model's attention calls, by the f32 operation of [`crate::attention::cpu`].

use super::Buffer;
use crate::attention::{Grads, Layout, View, ViewMut, cpu};
use crate::device::{Attention, AttentionGrad, Result, Rows, RowsMut, runs};
