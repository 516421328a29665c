"""The online teacher."""
