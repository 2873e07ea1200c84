//! Which loaded program or kernel a code or data address belongs to.

use std::ffi::c_void;

/// Load address of the program or shared object an address lies in.
pub(crate) fn image_base(address: usize) -> Option<usize> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr takes any address and fills `info`, whose all-zero value is valid.
    unsafe {
        let found = libc::dladdr(address as *const c_void, info.as_mut_ptr());
        (found != 0).then(|| info.assume_init().dli_fbase as usize)
    }
}
