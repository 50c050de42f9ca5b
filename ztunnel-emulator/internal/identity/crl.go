package identity

import "crypto/x509"

// CRL is a set of revocation lists from a file.
type CRL struct{}

// Check returns nil.
func (c *CRL) Check([]*x509.Certificate) error { return nil }
