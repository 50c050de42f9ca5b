package interop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// ca is a CA as ztunnel's test CA is: RSA. With an EC key OpenSSL would take the
// leaves, whose subject is their issuer's, for signed by themselves.
type ca struct {
	dir  string // cert.pem and key.pem are in there, and what it has signed
	cert *x509.Certificate
	key  crypto.Signer
}

func newCA(t *testing.T) *ca {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: newSerial(t), Subject: pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	a := &ca{dir: t.TempDir(), key: key}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	a.write(t, "cert.pem", block("CERTIFICATE", der))
	a.write(t, "key.pem", keyBlock(t, key))
	return a
}

func (a *ca) root() string { return filepath.Join(a.dir, "cert.pem") }

func (a *ca) write(t *testing.T, name string, blocks ...[]byte) string {
	t.Helper()
	var all []byte
	for _, b := range blocks {
		all = append(all, b...)
	}
	path := filepath.Join(a.dir, name)
	must(t, os.WriteFile(path, all, 0o600))
	return path
}

// sign makes a certificate, and returns the file that it and its key are in.
func (a *ca) sign(t *testing.T, l identitytest.Leaf) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: newSerial(t), Subject: pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore: l.NotBefore, NotAfter: l.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: l.ExtKeyUsage, DNSNames: l.DNS,
	}
	for _, s := range l.URIs {
		u, err := url.Parse(s)
		must(t, err)
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	must(t, err)
	return a.write(t, template.SerialNumber.String()+".pem", block("CERTIFICATE", der), keyBlock(t, key))
}

// of signs what a workload has.
func (a *ca) of(t *testing.T, name string) string {
	t.Helper()
	return a.sign(t, identitytest.Good(idOf(name)))
}

// idOf is the identity of the service account name.
func idOf(name string) identity.ID {
	return identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: name}
}

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func keyBlock(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return block("PRIVATE KEY", der)
}

func newSerial(t *testing.T) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 159))
	must(t, err)
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
