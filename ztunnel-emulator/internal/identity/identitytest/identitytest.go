// Package identitytest makes what tests of a tunnel need: a CA in memory, the
// certificates that must not be accepted, and a peer that shows any of them.
package identitytest

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ambient-emulator/ztunnel-emulator/internal/identity"
)

// CA is a CA that also signs what an identity.CA would not. Its files are there
// until the test ends.
type CA struct {
	*identity.CA
	CertFile, KeyFile string

	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA with a root of its own. Its key is a P-256 one: quicker to make
// than the RSA key of a real root.
func NewCA(t testing.TB) *CA {
	t.Helper()
	key := newKey(t)
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial(t),
		Subject:               pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(1000 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)

	dir := t.TempDir()
	ca := &CA{cert: cert, key: key, CertFile: filepath.Join(dir, identity.RootFile), KeyFile: filepath.Join(dir, identity.KeyFile)}
	must(t, os.WriteFile(ca.CertFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(ca.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	ca.CA, err = identity.LoadCA(ca.CertFile, ca.KeyFile)
	must(t, err)
	return ca
}

// NewManager starts a Manager of the CA that the test's end closes. It logs nowhere
// unless opts says where.
func (ca *CA) NewManager(t testing.TB, opts identity.Options) *identity.Manager {
	t.Helper()
	opts.Log = cmp.Or(opts.Log, slog.New(slog.DiscardHandler))
	m := identity.NewManager(ca, opts)
	t.Cleanup(m.Close)
	return m
}

// Leaf says what stands in a certificate.
type Leaf struct {
	URIs                []string
	DNS                 []string
	NotBefore, NotAfter time.Time
	ExtKeyUsage         []x509.ExtKeyUsage // none means no such extension: good for anything
}

// Good is what a workload's certificate holds.
func Good(id identity.ID) Leaf {
	now := time.Now()
	return Leaf{
		URIs:        []string{id.String()},
		NotBefore:   now.Add(-time.Hour),
		NotAfter:    now.Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// Expired was good until a minute ago.
func Expired(id identity.ID) Leaf {
	l := Good(id)
	l.NotAfter = time.Now().Add(-time.Minute)
	return l
}

// NotYetValid is good from ten minutes from now.
func NotYetValid(id identity.ID) Leaf {
	l := Good(id)
	l.NotBefore = time.Now().Add(10 * time.Minute)
	return l
}

// NoSAN names nobody.
func NoSAN() Leaf {
	l := Good(identity.ID{})
	l.URIs = nil
	return l
}

// OnlyDNS names id as a DNS name, which never counts.
func OnlyDNS(id identity.ID) Leaf {
	l := NoSAN()
	l.DNS = []string{id.ServiceAccount + "." + id.Namespace + ".svc." + id.TrustDomain}
	return l
}

// OtherDomain is the same workload of another trust domain.
func OtherDomain(id identity.ID) Leaf {
	id.TrustDomain = "elsewhere." + id.TrustDomain
	return Good(id)
}

// OnlyUsage is good for nothing but usage.
func OnlyUsage(id identity.ID, usage x509.ExtKeyUsage) Leaf {
	l := Good(id)
	l.ExtKeyUsage = []x509.ExtKeyUsage{usage}
	return l
}

// Sign makes the certificate, with a new key.
func (ca *CA) Sign(t testing.TB, l Leaf) tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: serial(t),
		Subject:      pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore:    l.NotBefore,
		NotAfter:     l.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:  l.ExtKeyUsage,
		DNSNames:     l.DNS,
	}
	for _, s := range l.URIs {
		u, err := url.Parse(s)
		must(t, err)
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	must(t, err)
	leaf, err := x509.ParseCertificate(der)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// CRL makes a revocation list of the CA, as PEM, that names these certificates.
// It expired an hour ago, which must not matter.
func (ca *CA) CRL(t testing.TB, revoked ...*x509.Certificate) []byte {
	t.Helper()
	now := time.Now()
	list := &x509.RevocationList{
		Number:     serial(t),
		ThisUpdate: now.Add(-2 * time.Hour),
		NextUpdate: now.Add(-time.Hour),
	}
	for _, cert := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: now.Add(-time.Hour)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, ca.cert, ca.key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// ClientConfig is a client that shows certs, if any, and accepts anybody.
func ClientConfig(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, Certificates: certs, NextProtos: []string{identity.ALPN}}
}

// ServerConfig is a server that shows cert, asks for a certificate and accepts any.
func ServerConfig(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, NextProtos: []string{identity.ALPN}}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 159))
	must(t, err)
	return n
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
