package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
)

// LoadCA reads a CA from two PEM files: certPath holds one root, or several, or an
// intermediate with its roots; keyPath the RSA or EC key of the one that signs
// (PKCS#1, PKCS#8 or SEC 1). All roots are trusted, whichever signs. With
// ztunnel's own test root and key, certificates are good for real ztunnels that
// run with FAKE_CA. An EC root should not be called O=cluster.local: see newRootKey.
func LoadCA(certPath, keyPath string) (*CA, error) {
	certPEM, err := os.ReadFile(certPath)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	keyPEM, err := os.ReadFile(keyPath)
	if err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	certs, err := parseCerts(certPEM)
	if err != nil {
		return nil, fmt.Errorf("CA certificate %s: %w", certPath, err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("CA key %s: %w", keyPath, err)
	}
	ca, err := newCA(certs, key)
	if err != nil {
		return nil, fmt.Errorf("CA certificate %s with key %s: %w", certPath, keyPath, err)
	}
	return ca, nil
}

const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY" // PKCS#8
)

// parseCerts returns all certificates in a PEM text; other blocks are passed over.
func parseCerts(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != pemCert {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it: want PEM, -----BEGIN CERTIFICATE-----")
	}
	return certs, nil
}

// parseKey returns the first private key in a PEM text; `openssl ecparam` writes
// the curve's parameters before it.
func parseKey(text []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, errors.New("no private key in it: want PEM, -----BEGIN PRIVATE KEY-----")
		}
		switch block.Type {
		case "RSA PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errEncrypted
			}
			return x509.ParsePKCS1PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errEncrypted
			}
			return x509.ParseECPrivateKey(block.Bytes)
		case pemKey:
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			switch key := key.(type) {
			case *rsa.PrivateKey:
				return key, nil
			case *ecdsa.PrivateKey:
				return key, nil
			}
			return nil, fmt.Errorf("a key of type %T: want RSA or EC", key)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errEncrypted
		}
	}
}

var errEncrypted = errors.New("the key is encrypted: decrypt it with `openssl pkey -in FILE -out FILE`")
