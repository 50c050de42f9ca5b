package identity

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The files of a CA directory, named as in ztunnel's sources. LoadCA reads them too.
const (
	RootFile = "root-cert.pem"
	KeyFile  = "ca-key.pem"
)

const (
	tempPrefix = ".new-"

	// staleAfter is the age of a temporary file whose maker must be dead.
	staleAfter = time.Minute
)

// OpenCA reads the CA in directory dir, and makes both on first use. Whoever else
// opens the same directory, at the same moment or later, gets the same root:
// ztunnels that share the directory trust each other, as those with FAKE_CA do.
//
// The directory must be ours, and nobody else may look into it. Nothing that is
// there is ever overwritten.
func OpenCA(dir string) (*CA, error) {
	ca, err := openCA(dir)
	if err != nil {
		return nil, fmt.Errorf("CA directory %s: %w", dir, err)
	}
	return ca, nil
}

func openCA(dir string) (*CA, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := checkPrivate(dir); err != nil {
		return nil, err
	}
	certPath, keyPath := filepath.Join(dir, RootFile), filepath.Join(dir, KeyFile)

	// The key first. Once it stands there it is everybody's, and so whoever makes
	// the certificate makes it for that key: killed in between or overtaken, the
	// two files always belong together. No lock, nothing to wait for. And so a
	// certificate seen before the key is looked for has lost its key.
	_, certErr := os.Lstat(certPath)
	keyPEM, err := settle(keyPath, func() ([]byte, error) {
		if certErr == nil {
			return nil, fmt.Errorf("%s is there and %s is not: put the key back, or remove %s to start with a new root", RootFile, KeyFile, certPath)
		}
		key, err := newRootKey()
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), err
	})
	if err != nil {
		return nil, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; remove %s and %s to start with a new root", KeyFile, err, keyPath, certPath)
	}
	certPEM, err := settle(certPath, func() ([]byte, error) {
		der, err := newRoot(key)
		return pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: der}), err
	})
	if err != nil {
		return nil, err
	}
	removeStale(dir)

	certs, err := parseCerts(certPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; remove %s to have it made again", RootFile, err, certPath)
	}
	ca, err := newCA(certs, key)
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w; remove both to start with a new root", RootFile, KeyFile, err)
	}
	return ca, nil
}

// checkPrivate refuses a directory in which others could read the key or change
// the root.
func checkPrivate(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return errors.New("is no directory")
	}
	if uid := st.Sys().(*syscall.Stat_t).Uid; int(uid) != os.Geteuid() {
		return fmt.Errorf("belongs to user %d, and we are user %d: name a directory of our own", uid, os.Geteuid())
	}
	if mode := st.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("others may enter it (mode %04o), and it holds a private key: chmod 700 %s", mode, dir)
	}
	return nil
}

// settle returns what the file at path holds, and makes it first if it is not
// there. Of several that do so at once one wins, and all return the winner's.
func settle(path string, create func() ([]byte, error)) ([]byte, error) {
	content, err := os.ReadFile(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return content, err
	}
	if content, err = create(); err == nil {
		err = publish(path, content)
	}
	if errors.Is(err, fs.ErrExist) {
		return os.ReadFile(path)
	}
	return content, err
}

// publish makes a file of mode 0600 appear at path whole. link(2) fails with
// EEXIST where rename(2) would replace: what is there stays.
func publish(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), tempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync() // before it has a name, or a power cut leaves an empty one
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a new name outlive a power cut: the key's before the certificate's.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// removeStale removes what starters that were killed have left: there is a key in
// it, if nobody's.
func removeStale(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		info, err := entry.Info()
		if err == nil && strings.HasPrefix(entry.Name(), tempPrefix) && info.Mode().IsRegular() && time.Since(info.ModTime()) > staleAfter {
			os.Remove(filepath.Join(dir, entry.Name()))
		}
	}
}
