//! Widths of heads that devices have no kernels for.

use super::ModelConfig;
use crate::model::switches::QkNorm;

/// Widths that every device computes with.
const ON_EVERY_DEVICE: [usize; 5] = [32, 64, 96, 128, 256];

impl ModelConfig {
    /// Sets the width of a head in files. Devices compute with multiples of 8: heads of another width above 32 are kept
    /// with zeros behind their elements, up to a width that every device has, so that nothing else is computed. Those
    /// of a model that norms queries and keys are not, since such a norm's mean is over all elements.
    pub fn set_head_dim(&mut self, head_dim: usize) {
        (self.head_dim, self.file_head_dim) = (head_dim, head_dim);
        let kept = head_dim <= ON_EVERY_DEVICE[0]
            || head_dim.is_multiple_of(8)
            || !head_dim.is_multiple_of(2)
            || self.switches.qk_norm != QkNorm::None;
        let longer = ON_EVERY_DEVICE.into_iter().find(|dim| *dim >= head_dim);
        if let (false, Some(longer)) = (kept, longer) {
            self.head_dim = longer;
            self.switches.rotary_dim.get_or_insert(head_dim);
            let scale = (head_dim as f64).sqrt().recip();
            self.switches.attention_scale.get_or_insert(scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_no_device_has_are_kept_longer() {
        let kept = |head_dim| {
            let mut config = ModelConfig::new(16, 64, 8, 1, 1, 1).unwrap();
            config.set_head_dim(head_dim);
            (config.head_dim, config.rotary_dim())
        };
        assert_eq!(kept(100), (128, 100));
        assert_eq!(kept(36), (64, 36));
        for own in [6, 32, 35, 64, 80, 96, 260] {
            assert_eq!(kept(own), (own, own));
        }
        let mut config = ModelConfig::new(16, 100, 8, 1, 1, 1).unwrap();
        assert_eq!(config.switches.attention_scale, Some(0.1));
        assert_eq!(config.to_json()["head_dim"], 100);
        let again = ModelConfig::from_json(config.to_json()).unwrap();
        assert_eq!((again.head_dim, again.file_head_dim), (128, 100));
        config.switches.qk_norm = QkNorm::Full;
        config.set_head_dim(100);
        assert_eq!(config.head_dim, 100);
    }
}
