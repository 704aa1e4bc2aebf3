"""The design that Forebay is held against: Flask under gunicorn, behind nginx, with a table in Postgres.

It takes the same body as Forebay and keeps the photo and its record, and does no more: no digest, no sync, no limits.
"""

import base64
import os
import uuid

import psycopg2
from flask import Flask, jsonify, request

app = Flask(__name__)
folder = os.environ["PEER_FOLDER"]
database = psycopg2.connect(os.environ["PEER_DATABASE"])


@app.post("/")
def upload():
    body = request.get_json()
    photo = base64.b64decode(body["image"])
    name = str(uuid.uuid4())
    with open(os.path.join(folder, name), "wb") as file:
        file.write(photo)
    with database, database.cursor() as cursor:
        cursor.execute(
            "INSERT INTO photos (id, device_id, size_bytes, state) VALUES (%s, %s, %s, 'queued')",
            (name, body["device_id"], len(photo)),
        )
    return jsonify(id=name, size_bytes=len(photo)), 201
