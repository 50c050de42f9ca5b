package identity_test

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

func TestCRLFollowsFile(t *testing.T) {
	ca := identitytest.NewCA(t)
	a, b := ca.Sign(t, identitytest.Good(client)), ca.Sign(t, identitytest.Good(server))
	f := openCRL(t, filepath.Join(t.TempDir(), "crl.pem"), ca)

	check := func(wantA, wantB bool) {
		t.Helper()
		if gotA, gotB := f.Revoked(chainOf(a)), f.Revoked(chainOf(b)); gotA != wantA || gotB != wantB {
			t.Errorf("revoked: %v, %v, want %v, %v", gotA, gotB, wantA, wantB)
		}
	}
	check(false, false)
	f.waitLog(t, "no CRL yet", 1)

	f.write(t, ca.CRL(t, a.Leaf))
	f.waitChanged(t)
	check(true, false)

	f.write(t, ca.CRL(t, a.Leaf, b.Leaf))
	f.waitChanged(t)
	check(true, true)

	// What can't be read changes nothing: garbage, half a list, no file, one that
	// is no file.
	list := ca.CRL(t)
	for i, bad := range [][]byte{[]byte("x"), list[:len(list)/2], nil, append(bytes.Clone(list), list[:len(list)/2]...), []byte(encode("CERTIFICATE", a.Certificate[0]))} {
		f.write(t, bad)
		f.waitLog(t, "CRL not updated", i+1)
		check(true, true)
	}
	must(t, os.Remove(f.path))
	f.waitLog(t, "no such file", 2)
	check(true, true)
	must(t, os.Mkdir(f.path, 0o700))
	f.waitLog(t, "is a directory", 1)
	must(t, os.Remove(f.path))
	check(true, true)

	// DER is read too, and writing in place is followed.
	block, _ := pem.Decode(ca.CRL(t, b.Leaf))
	must(t, os.WriteFile(f.path, block.Bytes, 0o600))
	f.waitChanged(t)
	check(false, true)
	f.write(t, ca.CRL(t))
	f.waitChanged(t)
	check(false, false)
}

// As Kubernetes changes a mounted volume: the file is a link through a link that
// is replaced, and in the file's own name nothing happens.
func TestCRLFollowsVolume(t *testing.T) {
	ca := identitytest.NewCA(t)
	a := ca.Sign(t, identitytest.Good(client))
	dir := t.TempDir()
	for version, text := range map[string][]byte{"..1": ca.CRL(t), "..2": ca.CRL(t, a.Leaf)} {
		must(t, os.Mkdir(filepath.Join(dir, version), 0o700))
		must(t, os.WriteFile(filepath.Join(dir, version, "crl.pem"), text, 0o600))
	}
	must(t, os.Symlink("..1", filepath.Join(dir, "..data")))
	must(t, os.Symlink("..data/crl.pem", filepath.Join(dir, "crl.pem")))
	f := openCRL(t, filepath.Join(dir, "crl.pem"), ca)
	if f.Revoked(chainOf(a)) {
		t.Error("revoked by an empty list")
	}
	must(t, os.Symlink("..2", filepath.Join(dir, "..new")))
	must(t, os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data")))
	f.waitChanged(t)
	if !f.Revoked(chainOf(a)) {
		t.Error("not revoked by the new version")
	}
}

// Corrupt at the start is off for good: no later file changes that.
func TestCRLCorruptAtStart(t *testing.T) {
	ca := identitytest.NewCA(t)
	a := ca.Sign(t, identitytest.Good(client))
	path := filepath.Join(t.TempDir(), "crl.pem")
	must(t, os.WriteFile(path, []byte("x"), 0o600))
	f := openCRL(t, path, ca)
	f.waitLog(t, "level=WARN msg=\"CRL is corrupt", 1)
	f.write(t, ca.CRL(t, a.Leaf))

	// Another one that watches the same directory sees that; ours has had its chance then.
	g := openCRL(t, path, ca)
	g.write(t, ca.CRL(t, a.Leaf, a.Leaf))
	g.waitChanged(t)
	if f.Revoked(chainOf(a)) {
		t.Error("switched on again")
	}

	if _, err := OpenCRL("/nowhere/crl.pem", ca.Roots(), CRLOptions{}); err == nil || !strings.Contains(err.Error(), "/nowhere/crl.pem: the directory must be there") {
		t.Errorf("no directory: %v", err)
	}
}
