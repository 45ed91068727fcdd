package metadata

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"time"
)

const maxTTL = 6 * time.Hour

// tokens makes and checks tokens without keeping any, so that a guest cannot fill the memory with them: each says itself until when it
// is good, under a key that lives as long as the service.
type tokens struct{ key [32]byte }

func newTokens() (t tokens) {
	_, _ = rand.Read(t.key[:]) // never fails
	return t
}

const (
	tokenHead = 8 + 8 // when it ends in Unix nanoseconds, and what tells it from others
	tokenSize = tokenHead + sha256.Size
)

func (t *tokens) issue(ttl time.Duration) string {
	token := make([]byte, tokenHead, tokenSize)
	binary.BigEndian.PutUint64(token, uint64(time.Now().Add(ttl).UnixNano()))
	_, _ = rand.Read(token[8:])
	return base64.URLEncoding.EncodeToString(t.sign(token))
}

func (t *tokens) sign(head []byte) []byte {
	mac := hmac.New(sha256.New, t.key[:])
	mac.Write(head)
	return mac.Sum(head)
}

func (t *tokens) good(text string) bool {
	token, err := base64.URLEncoding.DecodeString(text)
	if err != nil || len(token) != tokenSize {
		return false
	}
	head := token[:tokenHead:tokenHead]
	return hmac.Equal(t.sign(head), token) && time.Now().UnixNano() < int64(binary.BigEndian.Uint64(head))
}
