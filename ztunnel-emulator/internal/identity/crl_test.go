package identity_test

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ambient-emulator/internal/testmain"
	. "ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// crlFile is a CRL file, whoever follows it, and what was said about it.
type crlFile struct {
	*CRL
	path    string
	log     *testmain.Log
	changed chan struct{}
}

// openCRL opens the file at path, of these CAs.
func openCRL(t *testing.T, path string, cas ...*identitytest.CA) *crlFile {
	t.Helper()
	f := &crlFile{path: path, log: new(testmain.Log), changed: make(chan struct{}, 100)}
	var roots []*x509.Certificate
	for _, ca := range cas {
		roots = append(roots, ca.Roots()...)
	}
	var err error
	f.CRL, err = OpenCRL(path, roots, CRLOptions{Debounce: 10 * time.Millisecond, Log: slog.New(slog.NewTextHandler(f.log, nil))})
	must(t, err)
	t.Cleanup(func() { must(t, f.Close()) })
	f.OnChange(func() { f.changed <- struct{}{} })
	return f
}

// write replaces the file, as who does it well does: never half of it to be seen.
func (f *crlFile) write(t *testing.T, text []byte) {
	t.Helper()
	must(t, os.WriteFile(f.path+".new", text, 0o600))
	must(t, os.Rename(f.path+".new", f.path))
}

func (f *crlFile) waitChanged(t *testing.T) {
	t.Helper()
	select {
	case <-f.changed:
	case <-time.After(10 * time.Second):
		t.Fatalf("no change seen; log:\n%s", f.log)
	}
}

// waitLog waits until the log holds text n times.
func (f *crlFile) waitLog(t *testing.T, text string, n int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for strings.Count(f.log.String(), text) < n {
		if time.Now().After(deadline) {
			t.Fatalf("not %d times %q in the log:\n%s", n, text, f.log)
		}
		time.Sleep(time.Millisecond)
	}
}

func chainOf(cert tls.Certificate) []*x509.Certificate { return []*x509.Certificate{cert.Leaf} }

// Both ends refuse a revoked peer, in a handshake and afterwards; the list's own
// age does not matter.
func TestCRLHandshake(t *testing.T) {
	ca := identitytest.NewCA(t)
	revoked, good := ca.Sign(t, identitytest.Good(client)), ca.Sign(t, identitytest.Good(client))
	path := filepath.Join(t.TempDir(), "crl.pem")
	must(t, os.WriteFile(path, ca.CRL(t, revoked.Leaf), 0o600))
	crl := openCRL(t, path, ca)
	m := ca.NewManager(t, Options{CRL: crl.CRL})
	before := ca.NewManager(t, Options{}) // checks nothing: how a connection came to stand

	c, s := shake(t, identitytest.ClientConfig(revoked), m.ServerConfig(server))
	var perr *PeerError
	if !errors.Is(s.err, ErrRevoked) || !errors.As(s.err, &perr) || !strings.Contains(s.err.Error(), "peer spiffe://cluster.local/ns/default/sa/client: serial ") {
		t.Errorf("server: %v", s.err)
	}
	if c.err == nil {
		t.Error("the client saw nothing of it")
	}
	c, _ = shake(t, m.ClientConfig(server, []ID{client}), identitytest.ServerConfig(revoked))
	if !errors.Is(c.err, ErrRevoked) {
		t.Errorf("client: %v", c.err)
	}
	if c, s := shake(t, identitytest.ClientConfig(good), m.ServerConfig(server)); c.err != nil || s.err != nil {
		t.Errorf("not revoked: client: %v; server: %v", c.err, s.err)
	}
	if c, s := shake(t, m.ClientConfig(client, []ID{server}), m.ServerConfig(server)); c.err != nil || s.err != nil {
		t.Errorf("not revoked: client: %v; server: %v", c.err, s.err)
	}
	if _, s := shake(t, identitytest.ClientConfig(revoked), before.ServerConfig(server)); !crl.Revoked(s.cs.PeerCertificates) {
		t.Errorf("what stands is not revoked (%v)", s.err)
	}
}

// Who signed the list counts, not who it names: another root of the same name can
// revoke nothing of ours, and what it has revoked of its own stays its own.
func TestCRLSignature(t *testing.T) {
	ca, namesake := identitytest.NewCA(t), identitytest.NewCA(t)
	a, b := ca.Sign(t, identitytest.Good(client)), ca.Sign(t, identitytest.Good(server))
	path := filepath.Join(t.TempDir(), "crl.pem")

	must(t, os.WriteFile(path, append(namesake.CRL(t, a.Leaf), ca.CRL(t, b.Leaf)...), 0o600))
	f := openCRL(t, path, namesake, ca)
	if err := f.Check(chainOf(a)); err != nil {
		t.Errorf("revoked by a namesake: %v", err)
	}
	if err := f.Check(chainOf(b)); !errors.Is(err, ErrRevoked) {
		t.Errorf("not revoked: %v", err)
	}

	f.write(t, namesake.CRL(t, b.Leaf))
	f.waitChanged(t)
	if err := f.Check(chainOf(a)); err == nil || errors.Is(err, ErrRevoked) || !strings.Contains(err.Error(), "not signed by the issuer") {
		t.Errorf("only a namesake's list: %v", err)
	}
	if f.Revoked(chainOf(b)) {
		t.Error("a namesake's list revokes")
	}
}

// An unknown issuer is allowed, and so is everybody without a CRL.
func TestCRLUnknown(t *testing.T) {
	ca := identitytest.NewCA(t)
	root := newAuthority(t, ecKey(t, ecCurve), nil, func(c *x509.Certificate) { c.Subject.Organization[0] = "nobody's" })
	path := filepath.Join(t.TempDir(), "crl.pem")
	must(t, os.WriteFile(path, ca.CRL(t), 0o600))
	if err := openCRL(t, path, ca).Check([]*x509.Certificate{root.cert}); err != nil {
		t.Error(err)
	}
	var none *CRL
	if none.Revoked([]*x509.Certificate{root.cert}) || none.Close() != nil {
		t.Error("no CRL revokes")
	}
}

// A revoked intermediate takes its leaves with it.
func TestCRLChain(t *testing.T) {
	key := ecKey(t, ecCurve)
	rootKey := ecKey(t, ecCurve)
	root := newAuthority(t, rootKey, nil, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })
	inter := newAuthority(t, key, root, func(c *x509.Certificate) {
		c.Subject.Organization[0] = "between"
		c.KeyUsage |= x509.KeyUsageCRLSign
	})
	ca, err := load(t, inter.pem()+root.pem(), pkcs8(t, key))
	must(t, err)
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: inter.cert.SerialNumber, ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: inter.cert.SerialNumber, RevocationTime: time.Now()}},
	}, root.cert, rootKey)
	must(t, err)
	path := filepath.Join(t.TempDir(), "crl.pem")
	must(t, os.WriteFile(path, []byte(encode("X509 CRL", list)), 0o600))
	crl, err := OpenCRL(path, ca.Roots(), CRLOptions{Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer crl.Close()
	m := NewManager(ca, Options{CRL: crl})
	defer m.Close()
	if _, s := shake(t, m.ClientConfig(client, []ID{server}), m.ServerConfig(server)); s.err == nil {
		t.Error("the server accepted a leaf of a revoked intermediate")
	}
	cert, err := m.Certificate(t.Context(), client)
	must(t, err)
	chain := []*x509.Certificate{cert.TLS.Leaf, inter.cert}
	if !crl.Revoked(chain) {
		t.Error("not revoked")
	}

	// The intermediate's own list, which only a chain that holds it can prove.
	list, err = x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: inter.cert.SerialNumber, ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: cert.TLS.Leaf.SerialNumber, RevocationTime: time.Now()}},
	}, inter.cert, key)
	must(t, err)
	own, err := ParseCRL(list, ca.Roots())
	must(t, err)
	if err := own.Check(chain); !errors.Is(err, ErrRevoked) {
		t.Errorf("by the intermediate: %v", err)
	}
	if err := own.Check(chain[:1]); err == nil || errors.Is(err, ErrRevoked) {
		t.Errorf("without the intermediate: %v", err)
	}
}

// Only who has the CA's key can revoke: whatever is made of a list that names
// nobody, it still names nobody.
func FuzzCRL(f *testing.F) {
	ca := identitytest.NewCA(f)
	leaf := ca.Sign(f, identitytest.Good(client))
	list := ca.CRL(f)
	f.Add(list)
	f.Add(append(bytes.Clone(list), list...))
	block, _ := pem.Decode(list)
	f.Add(block.Bytes)
	block, _ = pem.Decode(identitytest.NewCA(f).CRL(f, leaf.Leaf))
	f.Add(block.Bytes)
	f.Fuzz(func(t *testing.T, text []byte) {
		if crl, err := ParseCRL(text, ca.Roots()); err == nil && crl.Revoked(chainOf(leaf)) {
			t.Errorf("revoked by %q", text)
		}
	})
}
