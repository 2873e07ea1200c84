//! Stands for `gpu` in a library without CUDA: no GPU can be opened.

use std::ffi::c_void;

use crate::failure::Failure;
use crate::types::{Backward, Forward, Problem};

pub(crate) enum Gpu {}

pub(crate) enum GpuPlan {}

impl Gpu {
    pub fn open(_: i32) -> Result<Self, Failure> {
        Err(Failure::NoCuda)
    }

    pub unsafe fn forward(&self, _: &Problem, _: &Forward) -> Result<GpuPlan, Failure> {
        match *self {}
    }

    pub unsafe fn backward(&self, _: &Problem, _: &Backward) -> Result<GpuPlan, Failure> {
        match *self {}
    }
}

impl GpuPlan {
    pub fn workspace_bytes(&self) -> usize {
        match *self {}
    }

    pub unsafe fn run(
        &self,
        _: *mut c_void,
        _: *mut c_void,
        _: usize,
        _: bool,
    ) -> Result<(), Failure> {
        match *self {}
    }
}
