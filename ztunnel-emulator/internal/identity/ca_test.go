package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
)

// Sheet 1.2, line by line.
func TestLeaf(t *testing.T) {
	ca, err := OpenCA(filepath.Join(t.TempDir(), "ca"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Issue(t.Context(), client, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.TLS.Certificate) != 1 {
		t.Errorf("a chain of %d, want the leaf alone", len(cert.TLS.Certificate))
	}
	leaf, root := cert.TLS.Leaf, ca.Roots()[0]
	if !bytes.Equal(leaf.RawIssuer, root.RawSubject) || leaf.Subject.String() != "O=cluster.local" || leaf.Issuer.String() != "O=cluster.local" {
		t.Errorf("subject %s, issuer %s", leaf.Subject, leaf.Issuer)
	}
	if leaf.SignatureAlgorithm != x509.SHA256WithRSA {
		t.Errorf("signature %v", leaf.SignatureAlgorithm)
	}
	if key, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		t.Errorf("key %T", leaf.PublicKey)
	}
	if leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() < 100 || leaf.SerialNumber.BitLen() > 159 {
		t.Errorf("serial of %d bits", leaf.SerialNumber.BitLen())
	}
	// KeyUsage, EKU and SAN, and nothing besides.
	var extensions []string
	for _, ext := range leaf.Extensions {
		extensions = append(extensions, ext.Id.String())
	}
	if got := strings.Join(extensions, " "); got != "2.5.29.15 2.5.29.37 2.5.29.17" {
		t.Errorf("extensions %s", got)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment {
		t.Errorf("key usage %b", leaf.KeyUsage)
	}
	if u := leaf.ExtKeyUsage; len(u) != 2 || u[0] != x509.ExtKeyUsageServerAuth || u[1] != x509.ExtKeyUsageClientAuth {
		t.Errorf("extended key usage %v", u)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != client.String() || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		t.Errorf("SANs %v", leaf.URIs)
	}
	now := time.Now()
	if now.Sub(leaf.NotBefore) < time.Minute || leaf.NotAfter.Sub(now) < 59*time.Minute || leaf.NotAfter.Sub(now) > time.Hour {
		t.Errorf("valid from %v to %v", leaf.NotBefore, leaf.NotAfter)
	}

	again, err := ca.Issue(t.Context(), client, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if again.TLS.Leaf.SerialNumber.Cmp(leaf.SerialNumber) == 0 || again.TLS.PrivateKey.(*ecdsa.PrivateKey).Equal(cert.TLS.PrivateKey) {
		t.Error("two certificates with one serial or one key")
	}

	if !root.IsCA || root.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || root.Subject.String() != "O=cluster.local" || root.Issuer.String() != "O=cluster.local" {
		t.Errorf("root: CA %v, key usage %b, subject %s", root.IsCA, root.KeyUsage, root.Subject)
	}
	if key, ok := root.PublicKey.(*rsa.PublicKey); !ok || key.N.BitLen() != 2048 {
		t.Errorf("root's key %T", root.PublicKey)
	}
	if now.Before(root.NotBefore) || root.NotAfter.Before(now.AddDate(99, 0, 0)) {
		t.Errorf("root valid from %v to %v", root.NotBefore, root.NotAfter)
	}
}

func TestIssueRefuses(t *testing.T) {
	ca, err := OpenCA(filepath.Join(t.TempDir(), "ca"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		id   ID
		ttl  time.Duration
		want string
	}{
		{ID{"error", "default", "web"}, time.Hour, "on purpose"},
		{ID{"td", "a/b", "c"}, time.Hour, "slash"},
		{ID{"td", "ü", "c"}, time.Hour, "does not fit a certificate"},
		{client, time.Millisecond, "too short"},
	} {
		if _, err := ca.Issue(t.Context(), tt.id, tt.ttl); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, %v: %v, want %s", tt.id, tt.ttl, err, tt.want)
		}
	}
}

// A leaf that outlived its CA would be refused before it is renewed.
func TestLeafEndsWithCA(t *testing.T) {
	key := ecKey(t, ecCurve)
	root := newAuthority(t, key, nil, nil)
	ca, err := load(t, root.pem(), pkcs8(t, key))
	must(t, err)
	cert, err := ca.Issue(t.Context(), client, 24*time.Hour)
	must(t, err)
	if end := cert.TLS.Leaf.NotAfter; !end.Equal(root.cert.NotAfter) {
		t.Errorf("leaf ends %v, CA %v", end, root.cert.NotAfter)
	}

	brief := newAuthority(t, key, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Second) })
	ca, err = load(t, brief.pem(), pkcs8(t, key))
	if err == nil { // still within that second
		_, err = ca.Issue(t.Context(), client, 24*time.Hour)
	}
	if err == nil || !strings.Contains(err.Error(), "expires at") && !strings.Contains(err.Error(), "the clock says") {
		t.Errorf("a CA at its end: %v", err)
	}
}

// authority makes a CA certificate with any template, signed by parent or itself.
type authority struct {
	key  crypto.Signer
	cert *x509.Certificate
}

func newAuthority(t *testing.T, key crypto.Signer, parent *authority, change func(*x509.Certificate)) *authority {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{Organization: []string{"test"}},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	if change != nil {
		change(template)
	}
	issuer, signer := template, key
	if parent != nil {
		issuer, signer = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert}
}

func (a *authority) pem() string { return encode("CERTIFICATE", a.cert.Raw) }

func encode(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// ecCurve is the quickest.
var ecCurve = elliptic.P256()

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func pkcs8(t *testing.T, key any) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return encode("PRIVATE KEY", der)
}

// load writes the two texts and loads them.
func load(t *testing.T, cert, key string) (*CA, error) {
	t.Helper()
	dir := t.TempDir()
	certPath, keyPath := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, text := range map[string]string{certPath: cert, keyPath: key} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return LoadCA(certPath, keyPath)
}

func TestLoadCA(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p256, p384 := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384())
	sec1, err := x509.MarshalECPrivateKey(p384)
	if err != nil {
		t.Fatal(err)
	}
	rsaRoot, ecRoot, second := newAuthority(t, rsaKey, nil, nil), newAuthority(t, p384, nil, nil), newAuthority(t, p256, nil, nil)
	interKey := ecKey(t, elliptic.P256())
	inter := newAuthority(t, interKey, rsaRoot, func(c *x509.Certificate) { c.Subject.Organization[0] = "between" })

	for _, tt := range []struct {
		name       string
		cert, key  string
		signer     *authority
		roots, len int // roots trusted, certificates shown
	}{
		{"RSA PKCS#1", rsaRoot.pem(), encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), rsaRoot, 1, 1},
		{"RSA PKCS#8", rsaRoot.pem(), pkcs8(t, rsaKey), rsaRoot, 1, 1},
		{"EC SEC 1 after parameters", ecRoot.pem(), encode("EC PARAMETERS", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}) + encode("EC PRIVATE KEY", sec1), ecRoot, 1, 1},
		{"EC PKCS#8", ecRoot.pem(), pkcs8(t, p384), ecRoot, 1, 1},
		{"the second of three roots", "text\n" + second.pem() + rsaRoot.pem() + ecRoot.pem(), pkcs8(t, rsaKey), rsaRoot, 3, 1},
		{"an intermediate", inter.pem() + rsaRoot.pem(), pkcs8(t, interKey), inter, 1, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ca, err := load(t, tt.cert, tt.key)
			if err != nil {
				t.Fatal(err)
			}
			cert, err := ca.Issue(t.Context(), client, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if err := cert.TLS.Leaf.CheckSignatureFrom(tt.signer.cert); err != nil {
				t.Errorf("signed by another: %v", err)
			}
			if len(cert.Roots) != tt.roots || len(cert.TLS.Certificate) != tt.len || len(cert.TLS.Leaf.AuthorityKeyId) != 0 {
				t.Errorf("%d roots, a chain of %d, AKI %x", len(cert.Roots), len(cert.TLS.Certificate), cert.TLS.Leaf.AuthorityKeyId)
			}
			m := NewManager(ca, Options{})
			defer m.Close()
			if c, s := shake(t, m.ClientConfig(client, []ID{server}), m.ServerConfig(server)); c.err != nil || s.err != nil {
				t.Errorf("client: %v; server: %v", c.err, s.err)
			}
		})
	}
}

func TestLoadCARefuses(t *testing.T) {
	key, otherKey := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P256())
	root := newAuthority(t, key, nil, nil)
	inter := newAuthority(t, otherKey, root, func(c *x509.Certificate) { c.Subject.Organization[0] = "between" })
	plain := newAuthority(t, key, nil, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })
	old := newAuthority(t, key, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	early := newAuthority(t, key, nil, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
	crlOnly := newAuthority(t, key, nil, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })

	for _, tt := range []struct {
		name, cert, key string
		want            []string
	}{
		{"another's key", root.pem(), pkcs8(t, otherKey), []string{"cert.pem", "key.pem", "belongs to none of the certificates", "take the key"}},
		{"no CA", plain.pem(), pkcs8(t, key), []string{"cert.pem", "may not sign others", "CA:TRUE"}},
		{"no keyCertSign", crlOnly.pem(), pkcs8(t, key), []string{"cert.pem", "may not sign others"}},
		{"expired", old.pem(), pkcs8(t, key), []string{"cert.pem", "valid from", "the clock says"}},
		{"not yet valid", early.pem(), pkcs8(t, key), []string{"cert.pem", "valid from", "the clock says"}},
		{"no root", inter.pem(), pkcs8(t, otherKey), []string{"cert.pem", "no root", "append"}},
		{"empty", "", pkcs8(t, key), []string{"cert.pem", "no certificate in it"}},
		{"garbage", encode("CERTIFICATE", []byte("x")), pkcs8(t, key), []string{"cert.pem", "malformed certificate"}},
		{"key for certificate", pkcs8(t, key), pkcs8(t, key), []string{"cert.pem", "no certificate in it"}},
		{"no key", root.pem(), root.pem(), []string{"key.pem", "no private key in it"}},
		{"encrypted", root.pem(), encode("ENCRYPTED PRIVATE KEY", []byte("x")), []string{"key.pem", "encrypted", "openssl pkey"}},
	} {
		_, err := load(t, tt.cert, tt.key)
		if err == nil {
			t.Errorf("%s: loaded", tt.name)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v\nwant %s", tt.name, err, want)
			}
		}
	}
	if _, err := LoadCA("/nowhere/cert.pem", "/nowhere/key.pem"); err == nil || !strings.Contains(err.Error(), "/nowhere/cert.pem") {
		t.Errorf("missing: %v", err)
	}
}
