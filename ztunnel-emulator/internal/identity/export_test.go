package identity

import "crypto/x509"

// ParseCRL is the decoder alone, without a file to follow.
func ParseCRL(text []byte, roots []*x509.Certificate) (*CRL, error) {
	lists, err := parseCRLs(text, roots)
	if err != nil {
		return nil, err
	}
	c := &CRL{}
	c.lists.Store(lists)
	return c, nil
}
