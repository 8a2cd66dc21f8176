"""The reference study: bias and spread of every form on synthetic catalogs, without a trained model."""
