package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"
)

const (
	// organization is the subject of root and leaf alike, as in ztunnel's test CA.
	organization = "cluster.local"

	// failDomain is the trust domain that ztunnel's test CA refuses on purpose.
	failDomain = "error"

	// skew is how far back a leaf's validity starts, for nodes whose clock is behind.
	skew = 2 * time.Minute

	// rootAge and rootLife are of a root that we make ourselves.
	rootAge  = time.Hour
	rootLife = 100 * 365 * 24 * time.Hour
)

// CA is a certificate authority with its key in this process, where ztunnel has
// istiod, or its test CA. It is safe for concurrent use.
type CA struct {
	key   crypto.Signer
	cert  *x509.Certificate   // that of key
	inter [][]byte            // DER: what stands between a leaf and a root; empty if cert is a root
	roots []*x509.Certificate // what our leaves verify their peers against
	pool  *x509.CertPool
}

// Roots returns the certificates that peers are verified against.
func (ca *CA) Roots() []*x509.Certificate { return ca.roots }

// Certificate is a workload's certificate with its key, and the roots that came
// with it. It never changes: rotation makes another.
type Certificate struct {
	ID    ID
	TLS   tls.Certificate     // the leaf and its intermediates, not the root; Leaf is set
	Roots []*x509.Certificate // peers are verified against these

	pool *x509.CertPool
}

// validAt tells whether the certificate is there and still valid; its start lies
// in the past.
func (c *Certificate) validAt(t time.Time) bool { return c != nil && t.Before(c.TLS.Leaf.NotAfter) }

// Issue signs a certificate for id, valid for ttl from now but no longer than the
// CA's own. The trust domain "error" fails on purpose, as with ztunnel's test CA.
//
// Each certificate has a key of its own, as when ztunnel asks istiod. Its test CA
// shares one key among all; who reads that one out of one process would be
// everybody, and making a P-256 key costs a fiftieth of the signature.
func (ca *CA) Issue(_ context.Context, id ID, ttl time.Duration) (*Certificate, error) {
	now := time.Now()
	left := ca.cert.NotAfter.Sub(now)
	switch parsed, err := ParseID(id.String()); {
	case err != nil || parsed != id:
		return nil, fmt.Errorf("%q is no identity: a part has a slash", id)
	case id.TrustDomain == failDomain:
		return nil, fmt.Errorf("the test CA refuses trust domain %q on purpose", failDomain)
	case ttl < time.Second:
		return nil, fmt.Errorf("a lifetime of %v is too short: certificates count in seconds", ttl)
	case left < time.Second:
		return nil, fmt.Errorf("the CA's own certificate expires at %s", stamp(ca.cert.NotAfter))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	san, err := marshalSAN(id)
	if err != nil {
		return nil, err
	}
	// No basic constraints, SKI or AKI: ztunnel's test CA has none.
	template := &x509.Certificate{
		SerialNumber:    newSerial(),
		Subject:         pkix.Name{Organization: []string{organization}},
		NotBefore:       now.Add(-skew),
		NotAfter:        now.Add(min(ttl, left)),
		KeyUsage:        x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		ExtraExtensions: []pkix.Extension{san},
	}
	issuer := *ca.cert
	issuer.SubjectKeyId = nil // or x509 adds an AKI
	der, err := x509.CreateCertificate(rand.Reader, template, &issuer, key.Public(), ca.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%q does not fit a certificate: %w", id, err)
	}
	return &Certificate{
		ID: id,
		TLS: tls.Certificate{
			Certificate: append([][]byte{der}, ca.inter...),
			PrivateKey:  key,
			Leaf:        leaf,
		},
		Roots: ca.roots,
		pool:  ca.pool,
	}, nil
}

// marshalSAN makes the extension ourselves: x509 would print the identity through
// net/url, which escapes.
func marshalSAN(id ID) (pkix.Extension, error) {
	uri := uriTag
	uri.Bytes = []byte(id.String())
	value, err := asn1.Marshal([]asn1.RawValue{uri})
	return pkix.Extension{Id: oidSAN, Value: value}, err
}

// newSerial returns 20 random bytes with the top bit cleared, so that the number
// stays positive in 20 bytes (RFC 5280, 4.1.2.2). ztunnel's test CA draws them
// from a fixed seed; a CRL that names one of ours means one certificate only.
func newSerial() *big.Int {
	b := make([]byte, 20)
	rand.Read(b) // never fails
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

// newRootKey makes the key of a root like that of ztunnel's test CA. RSA has a
// second reason: a leaf whose subject is its issuer's and whose key is of the
// signature's kind looks self-signed to OpenSSL, which then refuses it.
func newRootKey() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) }

// newRoot makes the certificate of a root with the given key.
func newRoot(key crypto.Signer) ([]byte, error) {
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{Organization: []string{organization}},
		NotBefore:             now.Add(-rootAge),
		NotAfter:              now.Add(rootLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	return x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
}

// newCA checks that certs, whichever of them signs, and key make a CA.
func newCA(certs []*x509.Certificate, key crypto.Signer) (*CA, error) {
	ca := &CA{key: key, pool: x509.NewCertPool()}
	inter := x509.NewCertPool()
	for _, cert := range certs {
		if samePublicKey(cert.PublicKey, key.Public()) && ca.cert == nil {
			ca.cert = cert
		}
		// A root is what has signed itself.
		if cert.CheckSignatureFrom(cert) == nil {
			ca.roots = append(ca.roots, cert)
			ca.pool.AddCert(cert)
		} else {
			inter.AddCert(cert)
		}
	}
	if ca.cert == nil {
		return nil, errors.New("the key belongs to none of the certificates: take the key of the one that is to sign")
	}
	if now := time.Now(); now.Before(ca.cert.NotBefore) || now.After(ca.cert.NotAfter) {
		return nil, fmt.Errorf("the certificate is valid from %s to %s, and the clock says %s", stamp(ca.cert.NotBefore), stamp(ca.cert.NotAfter), stamp(now))
	}
	if !ca.cert.IsCA || ca.cert.KeyUsage != 0 && ca.cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("the certificate of the key (subject %q) may not sign others: take a CA's, with CA:TRUE and keyCertSign", ca.cert.Subject)
	}
	chains, err := ca.cert.Verify(x509.VerifyOptions{
		Roots: ca.pool, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, fmt.Errorf("no root for the certificate of the key (subject %q): append the root's: %w", ca.cert.Subject, err)
	}
	for _, cert := range chains[0][:len(chains[0])-1] {
		ca.inter = append(ca.inter, cert.Raw)
	}
	return ca, nil
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
